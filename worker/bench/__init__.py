"""`ddpm bench`: what this machine gives, part by part."""
