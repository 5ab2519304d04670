"""What stays in a shipped model. Imports torch only."""
