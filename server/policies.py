"""The operator's policies: presets, and the default."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_vtprune import envs
from vllm_vtprune.options import refuse_unknown
from vllm_vtprune.policy import POLICY_FIELDS, PRESET, PolicyError, PruningPolicy, preset_of, without_preset
from vllm_vtprune.presets import DETAIL_DEFAULTS, builtin_presets
from vllm_vtprune.report import Placement

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

    from vllm_vtprune.plugin.processor import PruningProcessor

DEFAULT_PARAM = "--pruning-default"
DETAIL_PARAM = "--pruning-detail"
OFF_PRESET = "off"
RETURN_KEPT = "return_kept"


def fixed_counts(kv_transfer_config: KVTransferConfig | None = None) -> str:
    """The option of this server that requires token counts independent of features; empty if there is none.

    Raises:
        ValueError: VTPRUNE_PLACEMENT is not a placement.
    """
    if envs.placement() == "engine":
        return "--pruning-placement engine"
    if kv_transfer_config is None:
        return ""
    from vllm_vtprune.plugin.compat import counts_must_be_fixed  # imports vLLM

    return counts_must_be_fixed(kv_transfer_config)


@dataclass(frozen=True)
class Policies:
    """Presets and default policy.

    Attributes:
        presets: all presets, by name.
        default: policy of requests without one.
        default_preset: preset name of the default; None if the default is not a preset.
        fixed_counts: the engine option that requires token counts independent of features; empty if there is none.
        chosen: the default and the operator's own presets, by option or name; built-in presets do not count.
        detail: policies by OpenAI's ``detail`` of an image: a preset's name, a policy, or false; None: without effect.
            Defaults that conflict with `fixed_counts` are ``off``.
    """

    presets: Mapping[str, PruningPolicy]
    default: PruningPolicy
    default_preset: str | None
    fixed_counts: str = ""
    chosen: Mapping[str, PruningPolicy] = field(default_factory=dict)
    detail: Mapping[str, object] | None = None

    @classmethod
    def of_options(cls, args: Namespace, kv_transfer_config: KVTransferConfig | None = None) -> Policies:
        """`of` the options of `vtprune serve`, which `vllm serve` does not have.

        Raises:
            PolicyError: see `of`.
            ValueError: see `fixed_counts`.
        """
        return cls.of(
            getattr(args, "pruning_default", None),
            getattr(args, "pruning_presets", None),
            fixed_counts=fixed_counts(kv_transfer_config),
            follows_detail=getattr(args, "pruning_detail", False),
        )

    @classmethod
    def of(
        cls,
        default: object = None,
        presets: Mapping[str, PruningPolicy] | None = None,
        *,
        fixed_counts: str = "",
        follows_detail: bool = False,
    ) -> Policies:
        """Combine built-in presets and the operator's, which take precedence.

        Args:
            default: a policy in any form that a request may use; None for no pruning.
            presets: the operator's presets, maybe with a table of ``detail``.
            fixed_counts: see the attribute.
            follows_detail: whether ``detail`` chooses policies.

        Raises:
            PolicyError: the default is not a valid policy, or it or a policy of ``detail`` conflicts with
                `fixed_counts`.
        """
        all_presets = builtin_presets() | dict(presets or {})
        if isinstance(default, Mapping) and RETURN_KEPT in default:
            problem = "only requests ask for the kept positions"
            raise PolicyError(f"{DEFAULT_PARAM}.{RETURN_KEPT}", default[RETURN_KEPT], "it in a request", problem)
        policy = PruningPolicy.parse(default, param=DEFAULT_PARAM, presets=all_presets)
        chosen = {DEFAULT_PARAM: policy, **(presets or {})}
        of_file: Mapping[str, object] = getattr(presets, "detail", {})
        if of_file and not follows_detail:
            problem = "the file has a table [detail], which has no effect without --pruning-detail"
            raise PolicyError("--pruning-presets", dict(of_file), "this option too, or no such table", problem)
        followed = {
            name: preset if _follows(all_presets[preset], fixed_counts) else OFF_PRESET
            for name, preset in DETAIL_DEFAULTS.items()
        }
        detail = {**followed, **of_file} if follows_detail else None
        parsed = {
            f"{DETAIL_PARAM} {name}": PruningPolicy.parse(value, param=f"{DETAIL_PARAM} {name}", presets=all_presets)
            for name, value in (detail or {}).items()
        }
        policies = cls(all_presets, policy, preset_of(default), fixed_counts, chosen | parsed, detail)
        policies._refuse_counts(policy, DEFAULT_PARAM, default)
        for param, choice in parsed.items():
            policies._refuse_counts(choice, param, choice.dump())
        return policies

    def by_detail(self, detail: str | None) -> object:
        """The policy that a ``detail`` other than ``auto`` chooses; None if it chooses none."""
        return None if detail in (None, "auto") else (self.detail or {}).get(str(detail))

    @property
    def by_auto_detail(self) -> object:
        """The policy of images without a ``detail`` or with ``auto`` where the request sets none; None: the default."""
        return (self.detail or {}).get("auto")

    def placements(self, processor: PruningProcessor) -> set[Placement]:
        """Where the default and the operator's own presets select tokens; empty if they select none, and in a consumer.

        Raises:
            PolicyError: the family does not support one of all presets, or this server does not select for one of
                these; names the option or preset, and the field.
        """
        for name, policy in self.presets.items():
            policy.resolve(processor.family, param=name)
        resolved = {name: policy.resolve(processor.family, param=name) for name, policy in self.chosen.items()}
        if processor.engine_placement.role == "consumer":
            return set()
        selecting = {name: policy for name, policy in resolved.items() if policy.selects and self._accepts(policy)}
        return {processor.place(policy, param=name)[0] for name, policy in selecting.items()}

    def split(self, value: object, *, param: str = "pruning") -> tuple[object, bool]:
        """Separate the policy in a request's field from what an object may hold beside it.

        Args:
            value: a policy as for `parse`; an object may also hold ``return_kept``.
            param: name of the field.

        Returns:
            What `parse` reads, None for an object that names neither a preset nor a field of a policy; and
            ``return_kept``.

        Raises:
            PolicyError: names the first problem.
        """
        if not isinstance(value, Mapping):
            return value, False
        refuse_unknown(value, [*POLICY_FIELDS, PRESET, RETURN_KEPT], param=param)
        policy = dict(value)
        return_kept = policy.pop(RETURN_KEPT, False)
        if not isinstance(return_kept, bool):
            raise PolicyError(f"{param}.{RETURN_KEPT}", return_kept, "true or false")
        return without_preset(policy, self.presets, param) or None, return_kept

    def parse(self, value: object, *, param: str = "pruning") -> PruningPolicy:
        """Parse a request's policy; None means the server's default.

        Raises:
            PolicyError: names the first problem.
        """
        policy = PruningPolicy.parse(value, param=param, presets=self.presets, default=self.default)
        self._refuse_counts(policy, param, value)
        return policy

    def _refuse_counts(self, policy: PruningPolicy, param: str, value: object) -> None:
        """Raise PolicyError for a feature-dependent token count under `fixed_counts`."""
        if not self._accepts(policy):
            field, kind, accepted = policy.featureless_budget()
            problem = (
                f'a budget of the {field} "{kind}" depends on features and cannot be used with {self.fixed_counts}'
            )
            raise PolicyError(param, value, f"a budget of the {field} {accepted}", problem)

    def _accepts(self, policy: PruningPolicy) -> bool:
        return _follows(policy, self.fixed_counts)

    @property
    def available(self) -> dict[str, PruningPolicy]:
        """The presets that this server follows."""
        return {name: policy for name, policy in self.presets.items() if self._accepts(policy)}


def _follows(policy: PruningPolicy, fixed_counts: str) -> bool:
    """Whether a server with this option, if it has one, knows the policy's counts before it encodes."""
    return not (fixed_counts and policy.enabled and policy.budget.needs_features)
