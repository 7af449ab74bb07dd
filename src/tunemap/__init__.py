"""TuneMap: which way to fine-tune a language model on the hardware you have, with numbers that hold up."""
