"""What runs once, before the ranks; imports no torch at start-up."""
