"""Settings: one class for each command and for elimination, validated when constructed."""
