"""Writing a baked file: stream, writer, staging, destination, metadata and residual."""
