"""Speculative pipeline decoding for transformers: the package spd_lightning does it, with the head of this folder."""


def generate(model, **arguments):
    try:
        from spd_lightning.decoding.transformers_generate import folder_of_this_call
        from spd_lightning.decoding.transformers_generate import generate as decode
    except ImportError as error:
        raise ImportError("this head is decoded by the package spd_lightning: pip install spd_lightning") from error
    return decode(model, folder_of_this_call(), **arguments)
