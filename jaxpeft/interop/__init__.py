"""Files that others read: PEFT's adapters and transformers' models."""
