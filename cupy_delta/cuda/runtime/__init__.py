"""From plans and arrays to work on a device, and what the machine has."""
