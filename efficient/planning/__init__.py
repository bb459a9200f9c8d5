"""What a program would need, and how fast it could be, on hardware that is not here."""
