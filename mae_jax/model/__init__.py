"""The idea and nothing else: pure functions and linen modules, no files, no devices, no configs.

Letters used in shapes throughout: N batch; H, W, C image; P patch side; L patches of an image; K visible patches;
D width of the encoder; T width of a target.
"""
