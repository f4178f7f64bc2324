"""Small networks to try things on."""
