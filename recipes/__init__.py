"""What ``train.py`` trains: models, data and callbacks, in plain Lightning. The package never imports this folder."""
