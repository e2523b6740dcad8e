"""Model aliases with a preset, ``NAME@PRESET``, for clients that can set only the model."""

from __future__ import annotations

from collections.abc import Collection

from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission

from vllm_vtprune.options import did_you_mean
from vllm_vtprune_server.validation import refused

SEPARATOR = "@"


class UnknownPreset(LookupError):
    """An alias of a served model with an unknown preset; the message lists the known ones."""


class AliasedModels(OpenAIModelRegistry):
    """A server's models and their aliases.

    Routes that prune resolve aliases before they look up a model. Every other endpoint would serve the model unpruned,
    so there an alias is an error.

    Args:
        models: the server's models, whose registry this object replaces.
        presets: names of the presets.
    """

    def __init__(self, models: OpenAIServingModels, presets: Collection[str]) -> None:
        super().__init__(models.model_config, models.base_model_paths)
        self._models = models
        self._presets = presets

    @property
    def aliases(self) -> dict[str, tuple[str, str]]:
        """Alias -> (model, preset); names of served models are no aliases."""
        aliases = {
            f"{model.name}{SEPARATOR}{preset}": (model.name, preset)
            for model in self.base_model_paths
            for preset in self._presets
        }
        return {alias: target for alias, target in aliases.items() if not self._is_served(alias)}

    def resolve(self, name: str | None) -> tuple[str, str] | None:
        """The model and preset of an alias; None for any other name.

        Raises:
            UnknownPreset: the model is served, but there is no such preset.
        """
        if name is None or self._is_served(name):
            return None
        model, separator, preset = name.rpartition(SEPARATOR)
        if not separator or not self._is_served(model):
            return None
        if preset not in self._presets:
            raise UnknownPreset(
                f"The model `{name[:200]}` does not exist: `{model}` has no such preset"
                f"{did_you_mean(preset, self._presets)}; "
                f"expected {model}{SEPARATOR}PRESET with one of {', '.join(self._presets)}."
            )
        return model, preset

    def is_base_model(self, model_name: str) -> bool:
        """Whether a model of this name is served.

        Raises:
            InvalidField: the name is an alias.
        """
        if super().is_base_model(model_name):
            return True
        try:
            alias = self.resolve(model_name)
        except UnknownPreset:
            return False
        if alias is not None:
            problem = f"`{model_name}` names a pruning preset, and this endpoint does not prune"
            raise refused("model", problem, f"`{alias[0]}`")
        return False

    async def show_available_models(self) -> ModelList:
        listed = await super().show_available_models()
        cards = {card.id: card for card in listed.data}
        listed.data += [
            ModelCard(
                id=alias,
                parent=name,
                root=cards[name].root,
                max_model_len=cards[name].max_model_len,
                permission=[ModelPermission()],
            )
            for alias, (name, _) in self.aliases.items()
        ]
        return listed

    async def retrieve(self, name: str) -> ModelCard:
        """The card of a model, an adapter or an alias, as in the list of models.

        Raises:
            LookupError: no model, adapter or alias has this name.
        """
        listed = await self._models.show_available_models()
        for card in listed.data:
            if card.id == name:
                return card
        self.resolve(name)
        raise LookupError(f"The model `{name[:200]}` does not exist; GET /v1/models lists those that do.")

    def _is_served(self, name: str) -> bool:
        return super().is_base_model(name) or name in self._models.lora_requests
