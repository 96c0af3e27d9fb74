"""In the place of TensorFlow, as if it were not installed.

Keras imports TensorFlow to set its seed. That takes longer than what most of
the processes do that tests start on other backends.
"""

raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
