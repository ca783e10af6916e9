"""Memory: what a step needs, how much there is, and what happens when it was not enough."""
