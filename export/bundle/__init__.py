"""The bundle: a folder of files that run, with a manifest, golden samples and a report.

Making one (``fastadapt export``):

- ``pipeline``: the steps from a trained model to the bundle at its target.
- ``trained``, ``task_runs``: load the model: a run, several as tasks, a checkpoint, or a PEFT
  folder.
- ``samples``: chooses the images that parity is checked on.
- ``material``: what the later steps work with.
- ``gate``: ``gate()`` compares unfolded, folded and exported model.
- ``engine_options``, ``build``: the other files, and how they are built.
- ``golden``, ``record``, ``manifest``, ``report``, ``report_figures``: what is written beside them.
- ``staging``: a temporary folder that is renamed to the target.

Checking one (``fastadapt verify``):

- ``verify``: files and manifest, then every file that runs here on the golden samples.
- ``verify_artefact``: runs one file, compares its outputs and measures its speed.
"""
