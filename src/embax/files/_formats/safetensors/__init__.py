"""safetensors, and the folders of the Hugging Face world."""
