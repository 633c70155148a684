"""What runs leave behind, and how it is kept, found again and checked."""
