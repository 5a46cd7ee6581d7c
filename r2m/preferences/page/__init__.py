"""The web page on which people label pairs: which pair to whom, the server, its files for the browser."""
