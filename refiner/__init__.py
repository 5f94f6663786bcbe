"""The refiner: a small flow model that makes decoded images of any k sharp."""
