"""Consolidation: the experts of a checkpoint become prototypes. ``slot`` means router slot (expert index) in here."""
