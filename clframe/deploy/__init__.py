"""The trained model in use: prediction and export."""
