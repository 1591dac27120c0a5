"""The names that most programs need. Each is loaded when it is first used, so that `import cramlit` costs nothing."""
__version__ = "0.1.0"

_WHERE = {  # name → the module that defines it
    'get_recipe': 'core.scales', 'get_scale': 'core.scales',
    'prepare': 'data.packing', 'open_data': 'data.packing', 'load_tokenizer': 'data.tokenizer',
    'MaskedLM': 'model.encoder', 'pretrain': 'training.training', 'export_all': 'training.checkpoints',
    'evaluate': 'evaluation.protocol', 'plan': 'efficiency.planner', 'search': 'experiments.search',
    'export_with_card': 'reporting.model_card'}
__all__ = [*_WHERE]


def __getattr__(name: str):
    if name not in _WHERE: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    from fastcore.docments import docments
    found = getattr(import_module(f'{__name__}.{_WHERE[name]}'), name)
    comments = [f'{argument}: {text}' for argument, text in docments(found).items() if text]
    found.__doc__ = '\n'.join([found.__doc__, '', *comments])  # so that `help` has what the source has
    return globals().setdefault(name, found)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
