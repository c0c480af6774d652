"""Using a trained ALBEF: `albef_ds.load` finds out what a checkpoint is, the object it returns does what that kind can
do. loading.py reads, model.py computes, forms.py converts, commands.py and page.py are for people."""
