"""`r2m demo`, and the movie reviews that it trains on."""
