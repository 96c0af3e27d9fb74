"""Adapters from and to Hugging Face PEFT, also as LoRA."""
