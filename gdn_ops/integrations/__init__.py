"""Floor 4: bridges to other libraries. Each module needs its library, and is imported by its own name."""
