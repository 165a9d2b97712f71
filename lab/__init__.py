"""The lab: the house's own decisions on virtual time. Floor 2, may import everything below."""
