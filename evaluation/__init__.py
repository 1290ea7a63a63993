"""What evaluate.py measures with: measures (numpy alone), compare and report made of them, and judge (PersonaGym)."""
