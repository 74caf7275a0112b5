"""Fast forms of what the registries of model/ define, most of them for one kind of chip. Interfaces and meaning: there."""
