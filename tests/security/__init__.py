"""Files made to do harm, in every place where a stranger's file is read or a stranger's text is shown.

More of them, made at random, in tests/fuzz; weights and checkpoints that would run code in
tests/training/test_checkpoint_files.py, tests/training/test_resume.py and tests/model/test_reference_weights.py.
"""
