"""What a student is deployed as: the model file, and a page that generates in a browser."""
