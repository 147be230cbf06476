"""The embedded scheduler inside other systems' own interfaces, one file each; nothing in the package imports them."""
