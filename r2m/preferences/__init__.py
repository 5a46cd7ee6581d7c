"""Fresh labels of the policy's own responses: who gives them, which pairs are asked about, what is kept of them."""
