"""Every method on one model of each family of torchvision, timm and transformers: `make sweep`."""
