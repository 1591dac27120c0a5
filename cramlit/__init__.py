"""The names that most programs need. Each is loaded when it is first used, so that `import cramlit` costs nothing."""
__version__ = "0.1.0"

WHERE = {  # name → the module that defines it
    'get_recipe': 'core.scales', 'get_scale': 'core.scales',
    'prepare': 'data.packing', 'open_data': 'data.packing', 'load_tokenizer': 'data.tokenizer',
    'MaskedLM': 'model.encoder', 'pretrain': 'training.training', 'export_all': 'training.checkpoints',
    'evaluate': 'evaluation.protocol', 'plan': 'efficiency.planner', 'search': 'experiments.search',
    'export_with_card': 'reporting.model_card'}
__all__ = [*WHERE]


def __getattr__(name: str):
    if name not in WHERE: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    globals()[name] = getattr(import_module(f'{__name__}.{WHERE[name]}'), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *WHERE})
