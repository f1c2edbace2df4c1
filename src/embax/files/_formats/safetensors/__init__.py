"""safetensors files: embax's own format, and Hugging Face models with their tokenizers."""
