"""A study of seconds: the model and the file that several tests of whole stages start from; copy before a change."""

from typing import Any

ARCHITECTURE: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
STUDY: dict[str, Any] = {
    "study": "small",
    "data_root": "data",
    "models": {"small": {"source": "random", "config": "qwen2", "tokenizer": "tokenizer"}},
    "datasets": {"arithmetic": {"task": "arithmetic", "source": "made", "train_rows": 64, "test_rows": 8}},
    "methods": {"full": {"kind": "full"}, "lora": {"kind": "lora", "rank": 2}},
    "defaults": {
        "model": "small",
        "dataset": "arithmetic",
        "max_length": 128,
        "max_steps": 6,
        "epochs": None,
        "measurement_warmup_steps": 1,
        "max_new_tokens": 64,
    },
    "experiments": [
        {"name": "methods", "question": "Which method?", "vary": {"method": ["full"]}, "profile": "torch"},
        {"name": "rank", "question": "Which rank?", "fixed": {"method": "lora"}, "vary": {"method.rank": [2]}},
    ],
}
