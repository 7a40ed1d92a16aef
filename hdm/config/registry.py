"""The registry: an axis is what a person may ablate, a variant is one config dataclass + one class + one decorator.

    from hdm.config.axes import MERGE

    @dataclass(kw_only=True, slots=True)
    class AddConfig:
        '''x + s.'''

    @MERGE.register("add", AddConfig)
    class Add(Merge): ...

That one edit makes `merge=add` work on the command line, in YAML, in sweeps, in `python -m hdm.variants merge`, in the contract
tests and in the generated docs. Outside code does the same in its own module and is named by `plugins=[my_lab.merges]`.

The axis files hold torch classes, and composing a configuration must not wait two seconds for torch. `hdm.config.deferred`
therefore executes only the config half of an axis file first; such a variant is *declared* with its class still to come, and
`Axis.build` completes the file.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from hdm.config.errors import ConfigError, suggest
from hdm.config.traits import validate

T = TypeVar("T")
Class = TypeVar("Class", bound=type)


def option(default: Any, help: str) -> Any:
    """A config field with its default and one line of help, shown by `python -m hdm.variants`."""
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        make = type(default) if dataclasses.is_dataclass(default) else default.copy
        return dataclasses.field(default_factory=make, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(kw_only=True, slots=True)
class Variant(Generic[T]):
    """One entry of an axis."""

    axis: str
    name: str
    config: type
    module: str
    qualname: str
    cls: Callable[..., T] | None = None

    @property
    def doc(self) -> str:
        """The first sentence of the config's docstring."""
        return " ".join((self.config.__doc__ or "").strip().split("\n\n")[0].split())

    def load(self) -> Callable[..., T]:
        """Return the class, completing its module first when only the config half has run."""
        if self.cls is None:
            getattr(importlib.import_module(self.module), self.qualname)
        if self.cls is None:
            raise ConfigError(f"{self.axis}={self.name}: {self.module} declares it but defines no class for it")
        return self.cls


class Axis(Generic[T]):
    """A named set of variants. `default` is the variant that the root configuration selects.

    `common` names the fields that every variant has and that belong to the run: choosing another variant keeps their values.
    """

    def __init__(self, name: str, doc: str, *, default: str, common: tuple[str, ...] = ()) -> None:
        self.name, self.doc, self.default, self.common = name, doc, default, common
        self.variants: dict[str, Variant[T]] = {}

    def declare(self, name: str, config: type, module: str, qualname: str) -> Variant[T]:
        """Enter `name` with its config type; the class may follow. Raises ConfigError when the name or the config is taken."""
        if not (dataclasses.is_dataclass(config) and isinstance(config, type)):
            raise ConfigError(
                f"{self.name}={name}: its config {config!r} is no dataclass; decorate it with @dataclass(kw_only=True, slots=True)"
            )
        validate(f"{self.name}={name}", config)
        known = self.variants.get(name)
        if known is None:
            for other in self.variants.values():
                if other.config is config:
                    raise ConfigError(
                        f"{self.name}={name}: {config.__name__} already configures '{other.name}'; give each its own config"
                    )
            known = self.variants[name] = Variant(axis=self.name, name=name, config=config, module=module, qualname=qualname)
        elif (known.module, known.qualname) != (module, qualname) or known.config is not config:
            raise ConfigError(
                f"{self.name}={name} is registered twice: by {known.module}.{known.qualname} and by {module}.{qualname}; rename one"
            )
        return known

    def register(self, name: str, config: type) -> Callable[[Class], Class]:
        """Class decorator: enter the class under `name`, configured by `config`."""

        def enter(cls: Class) -> Class:
            self.declare(name, config, cls.__module__, cls.__qualname__).cls = cls
            return cls

        return enter

    def names(self) -> list[str]:
        """The variants' names, in the order of the file."""
        return list(self.variants)

    def get(self, name: str) -> Variant[T]:
        """The variant called `name`; an unknown one lists the options and the closest match."""
        if name not in self.variants:
            raise ConfigError(
                f"{self.name}={name}: no such variant{suggest(name, self.variants)} (options: {', '.join(self.variants)})"
            )
        return self.variants[name]

    def of(self, config: object) -> Variant[T]:
        """The variant that `config` configures, by its type."""
        for variant in self.variants.values():
            if type(config) is variant.config:
                return variant
        raise ConfigError(f"{self.name}: {type(config).__name__} configures no variant (options: {', '.join(self.variants)})")

    def default_config(self) -> Any:
        """The default variant's config, with its defaults."""
        return self.get(self.default).config()

    def build(self, config: object, *args: Any, **kwargs: Any) -> T:
        """Construct the variant that `config` belongs to: `cls(config, *args, **kwargs)`."""
        return self.of(config).load()(config, *args, **kwargs)
