"""Images, from files to sharded device arrays; the only code that knows TensorFlow."""
