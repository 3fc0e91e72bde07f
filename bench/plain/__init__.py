"""Pages of ordinary user code without this package, which ``end_to_end`` runs beside it."""
