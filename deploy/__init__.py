"""What runs the server elsewhere, and watches it there."""
