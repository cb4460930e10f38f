"""Other libraries' ways in. Nothing here is imported by the rest of this one."""
