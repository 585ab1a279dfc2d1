"""The comparison that the README shows: `study.yaml`, and the report that its run leaves beside it."""
