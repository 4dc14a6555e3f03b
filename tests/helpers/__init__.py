"""What several test modules share. Test modules import nothing from each other."""
