"""The study file: every key that a study may hold, its type, its default and what it means.

The JSON schema (workflow/schemas/config.schema.json) and the reference page (config/README.md) are generated
from the classes below by `tunemap schema`; a test fails when they drift.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, create_model

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
FLAW_PATTERN = r"^F(0[1-9]|[1-3][0-9]|4[0-4])$"  # as docs/validity.md numbers them
FlawId = Annotated[str, Field(pattern=FLAW_PATTERN)]


class Section(BaseModel):
    """A part of a study file: unknown keys are errors, values are not coerced, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# --- models -----------------------------------------------------------------------------------------------


class HubModel(Section):
    """A model of the Hugging Face hub, downloaded once by `prepare_model`."""

    source: Literal["hub"]
    id: str = Field(description="Repository on the hub, such as Qwen/Qwen2.5-1.5B-Instruct.")
    revision: str = Field("main", description="Commit, tag or branch; a commit makes the study reproducible.")


class LocalModel(Section):
    """A model folder in hub layout: config.json, weights, tokenizer files."""

    source: Literal["local"]
    path: str = Field(description="Folder; a relative path starts at `data_root`.")


class RandomModel(Section):
    """An architecture with seeded random weights: speed and memory do not depend on the weights' values."""

    source: Literal["random"]
    config: str = Field(description="Folder or config.json of the architecture, relative to `data_root`.")
    tokenizer: str = Field(description="Folder of the tokenizer, relative to `data_root`.")
    overrides: dict[str, int | float | str | bool] = Field(
        default_factory=dict, description="Keys of config.json to change, such as num_hidden_layers: 2."
    )
    seed: NonNegativeInt = Field(0, description="Seed of the weights.")

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class TinyModel(Section):
    """A model built and pretrained here in a minute, accepted only with its pretraining accuracies."""

    source: Literal["tiny"]
    architecture: Literal["qwen2", "distilbert"] = Field("qwen2", description="Which tiny model to make.")
    seed: NonNegativeInt = Field(0, description="Seed of weights and pretraining data.")


ModelConfig = Annotated[HubModel | LocalModel | RandomModel | TinyModel, Field(discriminator="source")]


# --- datasets ---------------------------------------------------------------------------------------------


class DatasetConfig(Section):
    """A task with its data: where rows come from, how many are used, how a prompt is written."""

    task: Literal["arithmetic", "gsm8k", "sst2", "generation", "classification"] = Field(
        description="What is learned. `arithmetic` is made here; `generation` and `classification` are for "
        "your own jsonl or csv files."
    )
    source: Literal["made", "hub", "local", "file"] = Field(
        description="`made` (arithmetic and sst2; 2000 training and 200 test rows unless said), `hub` (id, revision), "
        "`local` (a folder in hub layout or with train/test files), `file` (train_file, test_file)."
    )
    id: str | None = Field(None, description="Repository on the hub; needed by source hub.")
    subset: str | None = Field(None, description="Configuration of a hub dataset, such as main for gsm8k.")
    revision: str = Field("main", description="Commit, tag or branch of a hub dataset.")
    path: str | None = Field(None, description="Folder of source local, relative to `data_root`.")
    train_file: str | None = Field(None, description="jsonl, csv or tsv file of source file, relative to `data_root`.")
    test_file: str | None = Field(None, description="jsonl, csv or tsv file of source file, relative to `data_root`.")
    prompt_field: str | None = Field(None, description="Column of the prompt or text (tasks of your own).")
    answer_field: str | None = Field(None, description="Column of the answer or label (tasks of your own).")
    train_rows: PositiveInt | None = Field(None, description="How many training rows to use; null: all.")
    test_rows: PositiveInt | None = Field(None, description="How many test rows to use; null: all.")
    seed: NonNegativeInt = Field(0, description="Seed of made data, and of the choice of rows.")
    held_out_share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Evaluate on this share of the training rows, held out from training, in place of the test split: "
        "what one published study did. Needs `accept_flaws: [F13]`.",
    )
    prompt_template: str | None = Field(
        None,
        description="Name in `prompt_templates`: the whole prompt, in place of chat template and system_prompt. "
        "Null: the tokenizer's chat template, or the bare prompt where it has none.",
    )
    system_prompt: str | None = Field(None, description="System message of the chat template.")
    accept_truncation: bool = Field(
        False, description="Train although more than 1 % of answers, prompts or texts are cut (reported loudly)."
    )


# --- methods ----------------------------------------------------------------------------------------------

Dtype = Literal["float32", "bfloat16", "float16"]


class Method(Section):
    """What all methods share: the factor values that a method brings along, such as its learning rate."""

    factors: PartialFactors = Field(
        default_factory=lambda: PartialFactors(),
        description="Factor values of this method, stronger than `defaults`, weaker than an experiment's.",
    )

    @property
    def base_quantization(self) -> str | None:
        """4-bit data type in which the frozen base is kept; None where it is not quantised."""
        return getattr(self, "quantization_type", None)


class FullMethod(Method):
    """Full fine-tuning: every parameter is trained."""

    kind: Literal["full"]


class AdapterMethod(Method):
    """What all adapters share: the base is frozen, and the weights beside it have a dtype of their own."""

    adapter_dtype: Dtype = Field("float32", description="Dtype in which adapter weights are kept.")


class LowRankMethod(AdapterMethod):
    """What LoRA and its relatives share: one layer class of peft, so that their timings can be compared."""

    dropout: Share = Field(0.0, description="Dropout in front of the adapters.")
    target_modules: str | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        "all-linear", description="`all-linear`, or a list of module names such as [q_proj, v_proj]."
    )
    learning_rate_ratio: PositiveFloat | None = Field(
        None,
        description="LoRA+: so many times as fast learns B as A (https://arxiv.org/abs/2402.12354); null: as fast.",
    )


class LoraMethod(LowRankMethod):
    """Low-rank adapters through peft (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    kind: Literal["lora"]
    rank: PositiveInt = Field(8, description="Rank r of the adapters.")
    alpha: PositiveFloat | None = Field(None, description="Scale alpha; null: 2 × rank.")
    rslora: bool = Field(False, description="Scale by alpha/√r (https://arxiv.org/abs/2312.03732).")


class QloraMethod(LoraMethod):
    """LoRA over a base model in 4 bits (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""

    kind: Literal["qlora"]  # type: ignore[assignment]
    quantization_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type of the base.")
    double_quantization: bool = Field(True, description="Quantise the quantisation constants too.")


class DataDriven(Section):
    """What methods have in common that look at training data before they start."""

    quantization_type: Literal["nf4", "fp4"] | None = Field(
        None, description="4-bit data type of the base; null: the base is not quantised."
    )
    double_quantization: bool = Field(True, description="Quantise the quantisation constants too.")
    estimation_batches: PositiveInt = Field(
        64, description="Batches of training rows that the start is computed from, over all devices."
    )
    estimation_batch_size: PositiveInt | None = Field(
        None, description="Rows of such a batch; null: per_device_batch_size."
    )


class GoraMethod(DataDriven, LowRankMethod):
    """LoRA with ranks and a start from the gradient (https://arxiv.org/abs/2502.12171), and the ladder up to it."""

    kind: Literal["gora"]
    variant: Literal[
        "lora",
        "rslora",
        "lora+",
        "rslora+lora+",
        "gora",
        "gora_official_scripts",
        "gora_exact_budget",
        "gora_ranks_only",
        "gora_init_only",
        "gora_hpml",
    ] = Field(
        "gora",
        description="`gora`: the paper's; `gora_official_scripts`: the ranks of its released code; "
        "`gora_exact_budget`: as many parameters as LoRA, for timings; `gora_ranks_only`: B = 0; `gora_init_only`: one "
        "rank for all; `lora` to `rslora+lora+`: controls with GoRA's random numbers; `gora_hpml`: what one published "
        "study ran under this name, PiSSA with size-biased ranks.",
    )
    reference_rank: PositiveInt | None = Field(
        None, description="Rank of the LoRA whose parameters are the budget; null: the variant's, 8 (gora_hpml: 16)."
    )
    alpha: PositiveFloat | None = Field(None, description="Scale alpha; null: 2 × reference_rank.")
    min_rank: PositiveInt | None = Field(
        None, description="Smallest rank of a module; null: reference_rank / 2 (gora_hpml: 1)."
    )
    max_rank: PositiveInt | None = Field(
        None, description="Largest rank of a module; null: 4 × reference_rank (gora_hpml: none)."
    )
    gamma: NonNegativeFloat | None = Field(
        None, description="Size of the first step relative to the gradient; null: the variant's, 0.05."
    )
    learning_rate_ratio: PositiveFloat | None = Field(
        None,
        description="LoRA+: so many times as fast learns B as A (https://arxiv.org/abs/2402.12354); null: the "
        "variant's, 16 (1 for lora, rslora, gora_hpml).",
    )
    allocation: Literal["paper", "official_scripts", "exact_budget", "uniform"] | None = Field(
        None, description="How importances become ranks; null: the variant's."
    )
    initialisation: Literal["compress", "zeros", "weight_svd"] | None = Field(
        None, description="Where A and B start; null: the variant's."
    )
    importance: Literal["mean", "frobenius"] | None = Field(
        None, description="Measure of a module's importance; null: the variant's."
    )
    route: Literal["unquantised", "dequantised"] = Field(
        "unquantised",
        description="Whose gradient, over a 4-bit base: that of the model before it is quantised (the authors'), or "
        "that of the dequantised weights, which keeps QLoRA's memory.",
    )


class PeftMethod(DataDriven, AdapterMethod):
    """Any method of peft by its name, with peft's own parameters."""

    kind: Literal["peft"]
    type: Literal[
        "LORA",
        "RSLORA",
        "DORA",
        "PISSA",
        "OLORA",
        "EVA",
        "LORA_GA",
        "CORDA",
        "LOFTQ",
        "ADALORA",
        "DELORA",
        "DEFT",
        "GLORA",
        "GRALORA",
        "HIRA",
        "LILY",
        "LOHA",
        "LOKR",
        "MISS",
        "PEANUT",
        "PSOFT",
        "OSF",
        "VERA",
        "PVERA",
        "RANDLORA",
        "TINYLORA",
        "UNILORA",
        "VBLORA",
        "FROD",
        "OFT",
        "BOFT",
        "HRA",
        "ROAD",
        "C3A",
        "FOURIERFT",
        "WAVEFT",
        "SHIRA",
        "SUPERTUNING",
        "IA3",
        "BEFT",
        "LN_TUNING",
        "PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "CARTRIDGE",
        "ADAPTION_PROMPT",
        "TRAINABLE_TOKENS",
        "SHADOW",
    ] = Field(description="peft's name of the method, or of a variant of LoRA.")
    parameters: dict[str, JsonValue] = Field(
        default_factory=dict, description="Parameters of peft's config class, checked by it when the run starts."
    )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class BaseMethod(Method):
    """No fine-tuning at all: the row that every comparison needs. Each experiment gets it without asking."""

    kind: Literal["base"]


BASE_METHOD = "base"  # the reserved name of the row without fine-tuning
MethodConfig = Annotated[FullMethod | LoraMethod | QloraMethod | GoraMethod | PeftMethod, Field(discriminator="kind")]
METHOD_CLASSES: tuple[type[Method], ...] = (FullMethod, LoraMethod, QloraMethod, GoraMethod, PeftMethod)


# --- factors ----------------------------------------------------------------------------------------------


def _factor(default: Any, description: str, scope: Literal["train", "evaluate"] = "train") -> Any:
    return Field(default, description=description, json_schema_extra={"scope": scope})


class Factors(Section):
    """Every knob of a run besides its model, dataset and method."""

    strategy: Literal["single", "ddp", "fsdp", "hybrid"] = _factor(
        "single", "How the run is spread over devices; `fsdp` shards per transformer block."
    )
    gpus: PositiveInt = _factor(1, "Number of devices, one process each (processes where there is no GPU).")
    nodes: PositiveInt = _factor(1, "Machines that `gpus` are spread over evenly; more than one needs Slurm.")
    reshard_after_forward: bool = _factor(
        True,
        "Whether `fsdp` and `hybrid` free a block's gathered weights after its forward pass and gather them again for "
        "the backward pass (less memory), or keep them (less communication).",
    )
    fsdp_unit: Literal["block", "model"] = _factor(
        "block",
        "What `fsdp` and `hybrid` gather at once: a transformer block, or the whole model, as one published study did; "
        "`model` needs `accept_flaws: [F04]`.",
    )
    per_device_batch_size: PositiveInt = _factor(8, "Examples per device and micro-batch (rows if packed).")
    gradient_accumulation: PositiveInt = _factor(1, "Micro-batches per optimizer step.")
    max_length: PositiveInt = _factor(512, "Longest sequence in tokens, prompt and answer together.")
    batching: Literal["longest", "length_grouped", "fixed_length", "packed"] = _factor(
        "longest",
        "`longest`: pad to the longest of the batch; `length_grouped`: the same with similar lengths together; "
        "`fixed_length`: pad to max_length; `packed`: several whole examples per row, kept apart by position ids; "
        "without any padding where attention goes by document: flash_attention_2, and sdpa on a CPU.",
    )
    precision: Literal["fp32", "bf16", "fp16", "pure_bf16"] = _factor(
        "fp32",
        "`bf16`/`fp16`: autocast, trained weights in fp32, frozen weights in 16 bits; `pure_bf16`: weights, "
        "gradients and optimizer states in bfloat16, no autocast.",
    )
    gradient_checkpointing: bool = _factor(False, "Recompute activations in the backward pass.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = _factor("sdpa", "Attention implementation.")
    logits: Literal["all", "label_tokens"] = _factor(
        "all",
        "Which logits a language model computes in training: those of `all` positions at once, or those of "
        "`label_tokens` alone, in chunks with their gradients (less memory and less work, the same loss).",
    )
    compile: bool = _factor(False, "Compile the model with torch.compile.")
    optimizer: Literal[
        "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "galore_adamw", "lomo", "adalomo"
    ] = _factor(
        "adamw",
        "`adamw` is torch's fused AdamW; `adafactor` torch's Adafactor, which keeps row and column sums in place of "
        "moments; `galore_adamw` keeps AdamW's moments of low-rank projections of the gradients; `lomo` (no state) and "
        "`adalomo` (rows and columns) change each weight during the backward pass and keep no gradients, on one "
        "device; these three are for full fine-tuning. The others are bitsandbytes' AdamW.",
    )
    galore_rank: PositiveInt = _factor(128, "Rank of GaLore's projections; used by optimizer galore_adamw alone.")
    galore_update_steps: PositiveInt = _factor(
        200, "Steps between new projections; used by optimizer galore_adamw alone."
    )
    learning_rate: PositiveFloat = _factor(1e-4, "Peak learning rate.")
    weight_decay: NonNegativeFloat = _factor(0.0, "Decoupled weight decay.")
    schedule: Literal["constant", "linear", "cosine"] = _factor(
        "linear", "Learning-rate schedule; its horizon is the real number of steps."
    )
    warmup_steps: NonNegativeInt = _factor(0, "Steps of linear learning-rate warm-up.")
    max_grad_norm: PositiveFloat | None = _factor(1.0, "Clip the gradient's global norm; null: no clipping.")
    max_steps: PositiveInt | None = _factor(None, "Stop after so many optimizer steps; null: epochs decide.")
    epochs: PositiveFloat | None = _factor(1.0, "Passes over the training rows; null: max_steps decides.")
    seed: NonNegativeInt = _factor(0, "Seed of adapters, data order and dropout; set by `seeds`.")
    threads_per_process: PositiveInt = _factor(1, "CPU threads of each process; changes the last bits.")
    measurement_warmup_steps: NonNegativeInt = _factor(
        5, "First steps that are trained but not counted in step time and throughput."
    )
    logging_steps: PositiveInt = _factor(10, "Steps per logging window; losses are read once per window.")
    checkpoint_steps: PositiveInt | None = _factor(None, "Steps between checkpoints; null: one a minute.")
    time_limit_minutes: PositiveFloat | None = _factor(None, "A longer run ends with the outcome `timeout`.")
    evaluation_batch_size: PositiveInt = _factor(64, "Prompts per batch of generation.", "evaluate")
    max_new_tokens: PositiveInt | None = _factor(
        None, "Generation limit in tokens; null: as long as the longest reference answer.", "evaluate"
    )
    extraction: Literal["lm_eval", "hpml"] = _factor(
        "lm_eval",
        "How an answer is read from an output: `lm_eval`, the first number after ####; `hpml`, the rule of a published "
        "study, which counts right answers as wrong and needs `accept_flaws: [F14]`.",
        "evaluate",
    )


def _scope(field: str) -> str:
    extra = Factors.model_fields[field].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["scope"])


EVALUATION_FACTORS = frozenset(name for name in Factors.model_fields if _scope(name) == "evaluate")
CHOICES = ("model", "dataset", "method")  # factors whose value is a name in the study


def _annotated(field: Any) -> Any:
    annotation = field.annotation
    return Annotated[annotation, *field.metadata] if field.metadata else annotation


def _partial(name: str, doc: str, names: dict[str, tuple[Any, str | None]], lists: bool) -> type[Section]:
    """A section in which every given key is optional; with `lists`, each key holds a list of values."""
    fields: dict[str, Any] = {}
    for key, (annotation, description) in names.items():
        kind: Any = Annotated[list[annotation], Field(min_length=1)] if lists else annotation  # type: ignore[valid-type]
        fields[key.replace(".", "__")] = (kind, Field(default=None, alias=key, description=description))
    model = create_model(name, __base__=Section, **fields)
    model.__doc__ = doc
    return model


def given(section: BaseModel) -> dict[str, Any]:
    """The keys that were written in the file, by the name they have there (unset ones are left out)."""
    names = {field: info.alias or field for field, info in type(section).model_fields.items()}
    return {names[field]: getattr(section, field) for field in names if field in section.model_fields_set}


SEED = "seed"  # the one factor that no section sets: the `seeds` of an experiment do
_FACTOR_TYPES: dict[str, tuple[Any, str | None]] = {
    name: (_annotated(field), field.description)
    for name, field in Factors.model_fields.items()
    if name != SEED  # an experiment's `seeds` would overwrite it in every run
}
if TYPE_CHECKING:  # the classes are built from the factors, which a type checker cannot follow

    class PartialFactors(Section): ...

    class Defaults(Section): ...

    class Fixed(Section): ...

    class Vary(Section): ...

else:
    PartialFactors = _partial("PartialFactors", "Some factors with their values.", _FACTOR_TYPES, lists=False)
    for _class in (*METHOD_CLASSES, BaseMethod):
        _class.model_rebuild()

_PARAMETER_TYPES: dict[str, tuple[Any, str | None]] = {
    f"method.{name}": (_annotated(field), field.description)
    for method in METHOD_CLASSES
    for name, field in method.model_fields.items()
    if name not in ("kind", "factors")
}
METHOD_PARAMETERS = tuple(_PARAMETER_TYPES)  # `method.rank` and its kind: an experiment may fix or vary them

_CHOICE_TYPES: dict[str, tuple[Any, str | None]] = {
    choice: (str, f"Name of a {choice} of this study.") for choice in CHOICES
}
_SHARED_TYPES = _CHOICE_TYPES | _FACTOR_TYPES
_POINT_TYPES = _SHARED_TYPES | _PARAMETER_TYPES
if not TYPE_CHECKING:
    Defaults = _partial("Defaults", "Factors of all runs unless set elsewhere.", _SHARED_TYPES, lists=False)
    Fixed = _partial("Fixed", "Factors that are the same in all runs of an experiment.", _POINT_TYPES, lists=False)
    Vary = _partial("Vary", "Factors to vary: the runs are all combinations.", _POINT_TYPES, lists=True)
FACTOR_SECTIONS: tuple[type[Section], ...] = (PartialFactors, Defaults, Fixed, Vary)
POINT_KEYS = (*_POINT_TYPES, SEED)  # what `exclude` and `only` may name
Match = dict[str, Any]


# --- the study --------------------------------------------------------------------------------------------


class Experiment(Section):
    """A named question: fixed factors, a grid of varied ones, and the seeds that repeat it."""

    name: Name = Field(description="Name of the experiment; unique in the study.")
    question: str = Field(description="The question that its table and figure answer.")
    fixed: Fixed = Field(default_factory=lambda: Fixed(), description="Factors equal in all its runs.")
    vary: Vary = Field(default_factory=lambda: Vary(), description="Factors with lists of values; full grid.")
    seeds: list[NonNegativeInt] = Field([0], min_length=1, description="Each point is repeated with each seed.")
    profile: Literal["none", "auto", "torch", "nsys"] = Field(
        "none",
        description="Repeat the first seed of each point for a few steps under a profiler: `torch` is torch.profiler, "
        "`nsys` Nsight Systems, `auto` nsys where it is installed and there is a GPU, else torch. Timings never come "
        "from there.",
    )
    roofline: bool = Field(
        False,
        description="Repeat one step of the points on one GPU, first seed of each, once more under Nsight Compute: "
        "bytes and FLOPs of every kernel. Needs a `profile`, `ncu` and the permission to read counters; takes minutes.",
    )
    inference: bool = Field(
        False,
        description="Measure generation (or classification) of the first seed of each point besides: latency, tokens/s "
        "and memory of the base, of the merged and unmerged adapter, and in 4 bits.",
    )
    exclude: list[Match] = Field(
        default_factory=list, description="Points to leave out: factor: value, or factor: [values]."
    )
    only: list[Match] = Field(default_factory=list, description="If given, only points that match one of these.")


class Hardware(Section):
    """The machine that the study runs on."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto`: CUDA where there is a GPU.")
    description: str | None = Field(
        None, description="Name of a file in resources/hardware, for memory limits, peaks and prices."
    )


class Report(Section):
    """How the report reads: `title` and `introduction` rerun it alone, the others also predictions, tables, figures."""

    title: str | None = Field(None, description="Heading of the report; null: the study's name.")
    introduction: str | None = Field(None, description="A paragraph below the heading.")
    baseline_method: str | None = Field(None, description="Method that others are compared with; null: the first.")
    published: Literal["nyu", "columbia", "rtx"] | None = Field(
        None,
        description="Make the tables and figures of this published study, and compare its numbers with these results.",
    )


class ScaledExperiment(Section):
    """What an experiment has otherwise at a scale; factors are replaced one by one, lists as a whole."""

    fixed: Fixed = Field(default_factory=lambda: Fixed(), description="Factors that replace those of `fixed`.")
    vary: Vary = Field(default_factory=lambda: Vary(), description="Factors whose lists replace those of `vary`.")
    seeds: list[NonNegativeInt] | None = Field(None, min_length=1, description="Other seeds; null: the same.")
    exclude: list[Match] | None = Field(None, description="Other points to leave out; null: the same.")
    only: list[Match] | None = Field(None, description="Other points to keep; null: the same.")


class Scale(Section):
    """The same study at another size: what it names replaces what the study has. Its results lie in STUDY-SCALE."""

    data_root: str | None = Field(None, description="Another start of relative paths; null: the same.")
    models: dict[Name, ModelConfig] = Field(default_factory=dict, description="Models in place of those so named.")
    datasets: dict[Name, DatasetConfig] = Field(
        default_factory=dict, description="Datasets in place of those so named."
    )
    methods: dict[Name, MethodConfig] = Field(default_factory=dict, description="Methods in place of those so named.")
    defaults: Defaults = Field(default_factory=lambda: Defaults(), description="Factors that replace `defaults`.")
    experiments: dict[Name, ScaledExperiment] = Field(
        default_factory=dict, description="Changes of experiments, by name."
    )
    hardware: Hardware = Field(default_factory=lambda: Hardware(), description="Keys that replace those of `hardware`.")


class Study(Section):
    """One study file."""

    study: Name = Field(description="Name of the study; its results lie in results/STUDY/.")
    data_root: str | None = Field(
        None,
        description="Where relative paths of models and datasets start; ~ and $VARIABLES are expanded. "
        "Null: the working directory.",
    )
    models: dict[Name, ModelConfig] = Field(min_length=1, description="Models by name.")
    datasets: dict[Name, DatasetConfig] = Field(min_length=1, description="Datasets by name.")
    prompt_templates: dict[Name, str] = Field(
        default_factory=dict,
        description="Whole prompts by name; {prompt} stands once in each, for the question.",
    )
    methods: dict[Name, MethodConfig] = Field(min_length=1, description="Fine-tuning methods by name.")
    defaults: Defaults = Field(
        default_factory=lambda: Defaults(), description="Factor values of all runs unless set elsewhere."
    )
    experiments: list[Experiment] = Field(min_length=1, description="The questions of the study.")
    hardware: Hardware = Field(default_factory=lambda: Hardware(), description="The machine.")
    report: Report = Field(default_factory=lambda: Report(), description="The report.")
    scales: dict[Name, Scale] = Field(
        default_factory=dict,
        description="Other sizes of the same study, chosen with `--config scale=NAME` or `tunemap plan --scale NAME`.",
    )
    accept_flaws: list[FlawId] = Field(
        default_factory=list,
        description="Known flaws (docs/validity.md) that the study repeats on purpose; their gates warn and refuse "
        "nothing. Without them such a study is refused, with the list that it needs.",
    )
