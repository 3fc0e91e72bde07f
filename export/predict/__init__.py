"""Predict and embed any number of images: ``fastadapt predict`` and ``fastadapt embed``.

``sources`` finds the images, ``decode_ahead`` decodes them while the model works, ``models`` is
what computes, ``columns`` what is written of it, ``formats`` how, ``parts`` keeps what is finished,
and ``job`` runs it all. Whatever the number of images, a few batches and one part are in memory.
"""
