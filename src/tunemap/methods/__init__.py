"""Fine-tuning methods: full, the LoRA family, GoRA, and any PEFT type by name."""
