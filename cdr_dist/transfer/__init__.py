"""How a pre-trained encoder serves another domain: what is fine-tuned, what is added, and who decides."""
