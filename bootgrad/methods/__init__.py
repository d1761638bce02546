"""Ways to the gradient of the penalties, one module each: exact, or estimated at a lower price."""
