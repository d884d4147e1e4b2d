"""One YAML and its flags to a checked, typed `RunConfig`. Knows nothing of MindSpore."""
