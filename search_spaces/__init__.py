"""Search spaces as YAML: what may be searched, what it is judged on, and the known losses that it
holds."""
